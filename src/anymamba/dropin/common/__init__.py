"""What several modules of the drop-in share."""
