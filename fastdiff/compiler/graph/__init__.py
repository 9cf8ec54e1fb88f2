"""What the nodes of a graph are and do, and the one spelling in which the matcher reads them."""
