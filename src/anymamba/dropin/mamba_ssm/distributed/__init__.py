"""Layers split over several processes: names to import, none to use."""
