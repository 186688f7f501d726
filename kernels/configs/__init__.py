"""Tile tables, one JSON file per device; `default.json` for devices without one."""
