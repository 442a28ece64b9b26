"""Published checkpoints of other projects become VideoMamba repositories: one command-line module for each family."""
