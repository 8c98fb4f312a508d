"""What stands between a Claude API client and the provider."""
