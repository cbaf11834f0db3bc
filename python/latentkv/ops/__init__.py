"""What an op is: its description and schema, the checks of its arguments, and what computes it in Python."""
