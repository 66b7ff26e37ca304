"""Tests of what a user of the cloud sees."""
