"""The command line: parses, calls one task, renders. Heavy rooms are imported when a command runs."""
