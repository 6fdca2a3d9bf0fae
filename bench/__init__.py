"""Measurements of sdrt against its peers, and the checkpoints that they need."""
