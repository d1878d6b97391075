"""What was run on what, with what: the record that stands beside a result. Standard library only."""
