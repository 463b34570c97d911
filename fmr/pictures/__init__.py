"""Pictures of a graph, an explorer page, what notebooks show, heat maps. They know nodes, not how a graph is made."""
