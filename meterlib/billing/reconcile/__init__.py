"""The provider's own reports against ours, with the causes of every difference."""
