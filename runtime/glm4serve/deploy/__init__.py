"""The service on other people's machinery."""
