"""The commands: argument parsing only, each a shell around one documented function."""
