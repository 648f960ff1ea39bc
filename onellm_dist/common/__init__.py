"""What every room may use: errors, files, logging, progress, names of files."""
