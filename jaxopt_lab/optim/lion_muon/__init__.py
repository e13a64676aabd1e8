"""LionMuon: alternating spectral and sign descent on one momentum buffer, and its relatives."""
