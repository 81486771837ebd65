"""What is done with a study's result: the subcommands of `flatmin`. Nothing in the pipeline depends on it."""
