"""SOAP, DyKAF and Shampoo: preconditioning by one factor a side."""
