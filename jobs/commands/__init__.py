"""Bodies of the verbs of the command line; `jobs.cli` imports each when it runs."""
