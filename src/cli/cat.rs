//! `headwater cat`: events, in order.

use std::io::{self, BufWriter, Write};

use crate::{EventType, Position, ReadError, Recorded, Revision, StreamId};

use super::failure::Failure;
use super::{Target, events, target};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    target: Target,
    /// Begins at this position; by default at the first event that there is
    #[arg(long, value_name = "POSITION")]
    from: Option<u64>,
    /// Prints at most so many events
    #[arg(long, value_name = "COUNT")]
    limit: Option<usize>,
    /// Only events of this stream
    #[arg(long)]
    stream: Option<StreamId>,
    /// Only events of this type
    #[arg(long = "type", value_name = "TYPE")]
    event_type: Option<EventType>,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let (journal, corruption) = target::open(&args.target.dir)?;
    let from = args.from.map_or(journal.start().position, Position::new);
    let end = journal.end().position;
    if from > end {
        // Damage is the likelier reason why an event that was there is not to be found.
        let beyond = ReadError::BeyondEnd { position: from, end };
        return Err(corruption.map_or(Failure::Read(beyond), Failure::Damaged));
    }
    let events: Box<dyn Iterator<Item = Result<Recorded, ReadError>>> = match &args.stream {
        Some(stream) => match journal.read_stream(stream, Revision::FIRST) {
            // What is left of it, unless more was asked for.
            Err(ReadError::TruncatedStream { first, .. }) if from >= journal.start().position => {
                Box::new(journal.read_stream(stream, first)?)
            }
            events => Box::new(events?),
        },
        None => Box::new(journal.read_all(from)?),
    };
    let mut out = BufWriter::new(io::stdout().lock());
    let mut left = args.limit.unwrap_or(usize::MAX);
    for event in events {
        if left == 0 {
            break;
        }
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                out.flush()?;
                return Err(error.into());
            }
        };
        let of_type = args.event_type.as_ref().is_none_or(|wanted| wanted == event.event_type());
        if of_type && event.position() >= from {
            events::print(&mut out, &event, args.target.json)?;
            left -= 1;
        }
    }
    out.flush()?;
    // If the limit was reached, everything that was asked for has been printed.
    let damaged = corruption.filter(|_| left > 0);
    damaged.map_or(Ok(()), |corruption| Err(Failure::Damaged(corruption)))
}
