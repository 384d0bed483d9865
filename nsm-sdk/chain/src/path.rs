//! Path rules, without I/O.

use nsm_proto::connection::{Connection, Path, PathSegment};
use uuid::Uuid;

/// Why a path is not acceptable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// The index points behind the end.
    #[error("Path.Index+1=={next} should be less or equal len(Path.PathSegments)=={len}")]
    Index {
        /// Index of the segment this process would get.
        next: usize,
        /// Number of segments.
        len: usize,
    },
    /// The sender's segment and the connection disagree.
    #[error("Current PathSegment.Id=={segment:?} should be equal Connection.Id=={connection:?}")]
    Id {
        /// Id in the sender's segment.
        segment: String,
        /// Id of the connection.
        connection: String,
    },
    /// An answer lacks the segment that it was asked with, or has another one in its place.
    #[error("Path.PathSegments[{index}].Id=={found:?} of the answer should be equal {asked:?}")]
    Answer {
        /// Index of the segment.
        index: usize,
        /// Its id in the request.
        asked: String,
        /// Its id in the answer; `None` if the answer's path ends before it, or there is none.
        found: Option<String>,
    },
}

/// Makes `connection` this process's own view: its id and path index become those of the segment called `name`,
/// which is appended, renamed or found. Returns the index to restore in the answer to the sender.
pub fn advance(connection: &mut Connection, name: &str) -> Result<usize, PathError> {
    let path = connection.path.get_or_insert_default();
    let index = path.index as usize;
    let segment = |id: &str| PathSegment { name: name.to_owned(), id: id.to_owned(), ..Default::default() };

    if path.path_segments.is_empty() {
        if connection.id.is_empty() {
            connection.id = new_id();
        }
        *path = Path { index: 0, path_segments: vec![segment(&connection.id)] };
        return Ok(0);
    }
    if let Some(own) = path.path_segments.get(index).filter(|own| own.name == name) {
        connection.id.clone_from(&own.id);
        return Ok(index);
    }

    let (next, len) = (index.saturating_add(1), path.path_segments.len());
    let Some(sender) = path.path_segments.get(index) else {
        return Err(PathError::Index { next, len });
    };
    if sender.id != connection.id {
        return Err(PathError::Id { segment: sender.id.clone(), connection: connection.id.clone() });
    }
    match path.path_segments.get_mut(next) {
        Some(own) => {
            if own.name != name {
                own.name = name.to_owned();
                own.id = new_id();
            }
            connection.id.clone_from(&own.id);
        }
        None => {
            connection.id = new_id();
            path.path_segments.push(segment(&connection.id));
        }
    }
    path.index = next as u32;
    Ok(index)
}

/// Whether the path of a message as it comes in goes through the process called `name` and on: it has been answered by the hops
/// behind it before.
pub fn leads_through(connection: &Connection, name: &str) -> bool {
    let own = [0, 1].into_iter().find(|&offset| segment(connection, offset).is_some_and(|s| s.name == name));
    own.is_some_and(|offset| segment(connection, offset + 1).is_some())
}

/// Makes an answer the view of the process again whose segment `index` has `id`: the inverse of [`advance`].
///
/// # Errors
/// The answer's path does not have that segment: it is about another connection, or about none.
pub fn restore(connection: &mut Connection, index: usize, id: &str) -> Result<(), PathError> {
    let path = connection.path.get_or_insert_default();
    let found = path.path_segments.get(index).map(|segment| segment.id.as_str());
    if found != Some(id) {
        let found = found.map(str::to_owned);
        return Err(PathError::Answer { index, asked: id.to_owned(), found });
    }
    id.clone_into(&mut connection.id);
    path.index = index as u32;
    Ok(())
}

/// A random id, UUID version 4.
pub fn new_id() -> String {
    Uuid::new_v4().to_string()
}

/// The index of the segment this view belongs to.
pub fn index(connection: &Connection) -> usize {
    connection.path.as_ref().map_or(0, |path| path.index as usize)
}

/// The segment `offset` away from the one this view belongs to.
pub fn segment(connection: &Connection, offset: isize) -> Option<&PathSegment> {
    let path = connection.path.as_ref()?;
    path.path_segments.get((path.index as usize).checked_add_signed(offset)?)
}

/// The same, to be changed.
pub fn segment_mut(connection: &mut Connection, offset: isize) -> Option<&mut PathSegment> {
    let path = connection.path.as_mut()?;
    path.path_segments.get_mut((path.index as usize).checked_add_signed(offset)?)
}

#[cfg(test)]
mod tests;
