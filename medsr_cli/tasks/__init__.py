"""What medsr does, as plain functions: a request in, a result out. Never a word to the terminal."""
