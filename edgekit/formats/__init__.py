"""Strict readers for the headers of untrusted model files."""
