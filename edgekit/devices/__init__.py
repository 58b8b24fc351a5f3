"""Where an engine runs: one file per kind of device."""
