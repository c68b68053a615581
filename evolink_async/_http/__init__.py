"""The conversation with the API: protocol, limiter, breaker, retry, transport, submit."""
