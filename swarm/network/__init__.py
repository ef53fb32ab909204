"""Everything between peers. The only folder that imports hivemind (its Kademlia DHT and its libp2p daemon)."""
