//! `headwater topology`: the nodes that a store's journals come from and go to, as a list or as a graph.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Write};

use serde_json::{Value, json};

use super::Target;
use super::failure::Failure;
use super::links::{self, Link, Place};

/// What `topology` is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    target: Target,
    /// Prints a graph for Graphviz: `headwater topology DIR --dot | dot -Tsvg > topology.svg`
    #[arg(long, conflicts_with = "json")]
    dot: bool,
}

/// Nodes by their ids; whoever hasn't said theirs by the address.
struct Graph {
    nodes: BTreeMap<String, Node>,
    edges: Vec<Edge>,
}

struct Node {
    /// For people.
    name: String,
    /// It lies in this store.
    is_here: bool,
}

struct Edge {
    from: String,
    to: String,
    journal: Option<String>,
    /// As the link says; `None` between nodes of a path, of which only those know.
    state: Option<String>,
    lag_events: Option<u64>,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let graph = Graph::of(&links::places(&args.target.dir)?);
    let mut out = io::stdout().lock();
    match (args.dot, args.target.json) {
        (true, _) => write!(out, "{}", graph.to_dot())?,
        (_, true) => writeln!(out, "{}", graph.to_json())?,
        _ => graph.print(&mut out)?,
    }
    Ok(out.flush()?)
}

impl Graph {
    fn of(places: &[Place]) -> Self {
        let mut graph = Self { nodes: BTreeMap::new(), edges: Vec::new() };
        for place in places {
            let journal = place.journal.as_ref();
            let id = journal.map_or_else(|| place.of.clone(), |it| it.node().to_string());
            graph.nodes.insert(id.clone(), Node { name: place.of.clone(), is_here: true });
            let journal = journal.map(|journal| journal.id().to_string());
            for link in &place.links {
                match link.text("direction") {
                    Some("from") => graph.add_upstream(link, &id, journal.as_deref()),
                    _ => graph.add_follower(link, &id, journal.as_deref()),
                }
            }
        }
        graph
    }

    /// One that is known by name or lies here stays so.
    fn add(&mut self, id: &str, name: Option<&str>) {
        let new = || Node { name: name.unwrap_or(id).to_owned(), is_here: false };
        let node = self.nodes.entry(id.to_owned()).or_insert_with(new);
        if let Some(name) = name.filter(|_| !node.is_here) {
            node.name = name.to_owned();
        }
    }

    fn add_edge(&mut self, from: &str, to: &str, journal: Option<&str>, link: Option<&Link>) {
        let state = link.and_then(|link| link.text("state")).map(str::to_owned);
        let lag_events = link.and_then(|link| link.number("lag_events"));
        let (from, to) = (from.to_owned(), to.to_owned());
        self.edges.push(Edge { from, to, journal: journal.map(str::to_owned), state, lag_events });
    }

    fn add_upstream(&mut self, link: &Link, here: &str, journal: Option<&str>) {
        let path = link.get("path").as_array().map_or(&[][..], Vec::as_slice);
        let path: Vec<&str> = path.iter().filter_map(Value::as_str).collect();
        let address = link.text("address");
        for (at, id) in path.iter().enumerate() {
            self.add(id, address.filter(|_| at + 1 == path.len()));
        }
        for pair in path.windows(2) {
            if let [from, to] = pair {
                self.add_edge(from, to, journal, None);
            }
        }
        let last = path.last().copied().or(address);
        if let Some(last) = last {
            self.add(last, address);
            self.add_edge(last, here, journal, Some(link));
        }
    }

    fn add_follower(&mut self, link: &Link, here: &str, journal: Option<&str>) {
        let id = link.text("node").or(link.text("address")).unwrap_or("unknown");
        self.add(id, link.text("name"));
        self.add_edge(here, id, journal, Some(link));
    }

    fn to_json(&self) -> Value {
        let node = |(id, node): (&String, &Node)| json!({ "id": id, "name": node.name, "here": node.is_here });
        let edge = |edge: &Edge| {
            json!({
                "from": edge.from,
                "to": edge.to,
                "journal": edge.journal,
                "state": edge.state,
                "lag_events": edge.lag_events,
            })
        };
        json!({
            "nodes": self.nodes.iter().map(node).collect::<Vec<_>>(),
            "links": self.edges.iter().map(edge).collect::<Vec<_>>(),
        })
    }

    fn name(&self, id: &str) -> String {
        match self.nodes.get(id) {
            Some(node) if node.name != id => format!("{} ({id})", node.name),
            _ => id.to_owned(),
        }
    }

    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        for edge in &self.edges {
            let (from, to) = (self.name(&edge.from), self.name(&edge.to));
            writeln!(out, "{from} -> {to}: {}", edge.label())?;
        }
        if self.edges.is_empty() {
            writeln!(out, "nobody follows, and nobody is followed")?;
        }
        Ok(())
    }

    /// Solid lines are of connections that there are.
    fn to_dot(&self) -> String {
        let mut dot = "digraph headwater {\n  rankdir=LR;\n  node [shape=box];\n".to_owned();
        for (id, node) in &self.nodes {
            let label = quoted(&format!("{}\n{id}", node.name));
            let style = if node.is_here { ", style=bold" } else { "" };
            writeln!(dot, "  {} [label={label}{style}];", quoted(id)).ok();
        }
        for edge in &self.edges {
            let style = if edge.is_connected() { "solid" } else { "dashed" };
            let (from, to, label) = (quoted(&edge.from), quoted(&edge.to), quoted(&edge.label()));
            writeln!(dot, "  {from} -> {to} [label={label}, style={style}];").ok();
        }
        dot.push_str("}\n");
        dot
    }
}

impl Edge {
    fn is_connected(&self) -> bool {
        matches!(self.state.as_deref(), Some("live" | "catching_up" | "stalled"))
    }

    fn label(&self) -> String {
        let state = self.state.as_deref().unwrap_or("unknown").replace('_', " ");
        match self.lag_events {
            Some(1) => format!("{state}, 1 event behind"),
            Some(events) => format!("{state}, {events} events behind"),
            None => format!("{state}, lag unknown"),
        }
    }
}

/// As a string of the language DOT.
fn quoted(text: &str) -> String {
    let escaped = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    format!("\"{escaped}\"")
}
