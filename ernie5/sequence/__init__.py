"""Codes become groups, groups become one packed batch: ids, features, positions, attention intervals, targets."""
