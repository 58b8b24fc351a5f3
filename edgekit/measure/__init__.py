"""Measurements of a model on an engine: numpy only, so that they run on a device."""
