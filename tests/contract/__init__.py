"""The clients' side of the API: the exchanges of each client, byte for byte, and the vectors of the wire facts."""
