"""Commands for people, around the pipeline."""

INTERRUPTED = "interrupted; run the same command again"  # what Ctrl-C makes of a command
