"""What a request and a streamed event cost in the proxy, next to nginx on the same machine in the same minute."""
