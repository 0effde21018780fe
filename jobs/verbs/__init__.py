"""The verbs of `telar`: options and what is printed. Bodies import what they need, so that `telar --help` is fast."""
