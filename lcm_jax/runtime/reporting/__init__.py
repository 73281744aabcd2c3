"""What a run tells of itself while it runs, and after."""
