"""HTTP: connections, deadlines, retries, circuit breaker; knows no JSON."""
