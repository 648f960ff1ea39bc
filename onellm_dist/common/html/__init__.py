"""Reports as static HTML: pages, tables and charts."""
