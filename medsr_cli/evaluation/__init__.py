"""How good a result is: metrics, protocols, consistency with the input."""
