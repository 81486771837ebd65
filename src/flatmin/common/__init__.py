"""What every stage depends on: errors, files, the console and the params schema."""
