"""What the user sees: live progress and the final table."""
