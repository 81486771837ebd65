"""Settings of every test."""

import signal

import hypothesis

# What a machine is busy with besides is no defect of the code under test.
hypothesis.settings.register_profile("flatmin", deadline=None)
hypothesis.settings.load_profile("flatmin")

# A shell's background job ignores Ctrl-C, and what the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
