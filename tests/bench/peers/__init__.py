"""One module per loader, each run by the interpreter of its own environment; see protocol.py."""
