"""What runs a recurrence: the contract in `base`, plain JAX in `reference`, a kernel each in `gpu` and `tpu`."""
