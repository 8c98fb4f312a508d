"""The one part that knows Redis: keys, scripts, flows, drivers and the embedded server."""
