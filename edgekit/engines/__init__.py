"""One file per engine, behind the protocol in `edgekit.engine`; found by its name."""
