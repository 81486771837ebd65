"""One module for each subcommand of `flatmin`: its function has the module's name.

They hold arguments and help, and import what does the work when they are called: `flatmin --help` imports them all.
"""
