"""HTTP: connections, deadlines, retries and the circuit breaker; bodies are opaque bytes here."""
