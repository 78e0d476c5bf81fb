"""The CPU's whole-step graphs: int8 products and fixed-point attention, in which no row's bits depend on another row."""
