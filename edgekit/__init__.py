"""edgekit: a language model and the small model that checks it, in one bundle proven on its device."""

__version__ = "0.1.0"
