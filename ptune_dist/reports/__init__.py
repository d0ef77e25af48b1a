"""What runs have learned, side by side: tables for the terminal, a page for the browser, charts. No torch."""
