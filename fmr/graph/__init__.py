"""From the events of a pass to a graph: nodes and scopes, fused ops opened, one op run again, two graphs compared."""
