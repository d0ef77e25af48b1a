"""Helpers for every layer: durable files, and whether the hub can be reached. Imports no torch."""
