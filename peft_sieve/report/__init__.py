"""Tables and figures, drawn from routing profiles."""
