"""Bodies of the verbs of the command line; `jobs.verbs` imports each when it runs."""
