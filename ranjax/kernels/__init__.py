"""What runs a recurrence: the contract in `base`, plain JAX in `reference`, Pallas kernels in `gpu` and `tpu`."""
