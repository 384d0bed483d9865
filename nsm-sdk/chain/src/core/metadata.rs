//! State of one connection, typed, and owned by the element that keeps it.
//!
//! The [`metadata`](crate::elements::metadata) element makes one [`Metadata`] per connection and process. An element
//! that remembers something holds a [`Key`] from its constructor on; two instances of the same element, or the same
//! element on the client and the server side, never see each other's values.

use std::{
    any::{Any, TypeId},
    fmt,
    marker::PhantomData,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

/// Which half of a process an element works for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// Towards the caller.
    Server,
    /// Towards the next hop.
    Client,
}

/// The right to one value of type `T` in each connection's metadata.
pub struct Key<T> {
    instance: u64,
    side: Side,
    value: PhantomData<fn() -> T>,
}

/// Instance 0 is for values that elements share, such as the remote that `dial` sets and `heal` reads.
static NEXT_INSTANCE: AtomicU64 = AtomicU64::new(1);

impl<T> Key<T> {
    /// A key nobody else has. Make it once, in the element's constructor.
    pub fn new(side: Side) -> Self {
        Self { instance: NEXT_INSTANCE.fetch_add(1, Ordering::Relaxed), side, value: PhantomData }
    }

    /// The key that all elements of a side share for this type.
    pub const fn shared(side: Side) -> Self {
        Self { instance: 0, side, value: PhantomData }
    }

    /// The side it was made for.
    pub fn side(&self) -> Side {
        self.side
    }
}

impl<T> fmt::Debug for Key<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key<{}>({}, {:?})", std::any::type_name::<T>(), self.instance, self.side)
    }
}

impl<T> Clone for Key<T> {
    fn clone(&self) -> Self {
        Self { instance: self.instance, side: self.side, value: PhantomData }
    }
}

type Id = (u64, Side, TypeId);

/// A dozen of them, in a list that has no room to spare.
#[derive(Default)]
struct Values(Vec<(Id, Box<dyn Any + Send>)>);

impl Values {
    fn get(&self, id: &Id) -> Option<&(dyn Any + Send)> {
        self.0.iter().find(|(known, _)| known == id).map(|(_, value)| &**value)
    }

    fn get_or_default<T: Default + Send + 'static>(&mut self, id: Id) -> &mut (dyn Any + Send) {
        let at =
            self.0.iter().position(|(known, _)| *known == id).unwrap_or_else(|| self.push(id, Box::<T>::default()));
        &mut *self.0[at].1
    }

    fn push(&mut self, id: Id, value: Box<dyn Any + Send>) -> usize {
        self.0.reserve_exact(1);
        self.0.push((id, value));
        self.0.len() - 1
    }

    fn insert(&mut self, id: Id, value: Box<dyn Any + Send>) -> Option<Box<dyn Any + Send>> {
        match self.0.iter_mut().find(|(known, _)| *known == id) {
            Some((_, known)) => Some(std::mem::replace(known, value)),
            None => {
                self.push(id, value);
                None
            }
        }
    }

    fn remove(&mut self, id: &Id) -> Option<Box<dyn Any + Send>> {
        let at = self.0.iter().position(|(known, _)| known == id)?;
        Some(self.0.swap_remove(at).1)
    }
}

/// All values kept for one connection in this process. Clones share them.
#[derive(Clone, Default)]
pub struct Metadata(Arc<Mutex<Values>>);

impl fmt::Debug for Metadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Metadata({} values)", self.values().0.len())
    }
}

impl Metadata {
    /// Metadata without any value.
    pub fn new() -> Self {
        Self::default()
    }

    fn values(&self) -> MutexGuard<'_, Values> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A copy of the value.
    pub fn get<T: Clone + Send + 'static>(&self, key: &Key<T>) -> Option<T> {
        self.values().get(&id(key))?.downcast_ref::<T>().cloned()
    }

    /// Sets the value and returns the one it replaces.
    pub fn insert<T: Send + 'static>(&self, key: &Key<T>, value: T) -> Option<T> {
        let old = self.values().insert(id(key), Box::new(value));
        unbox(old)
    }

    /// Takes the value out.
    pub fn remove<T: Send + 'static>(&self, key: &Key<T>) -> Option<T> {
        let old = self.values().remove(&id(key));
        unbox(old)
    }

    /// Whether there is a value.
    pub fn contains<T: 'static>(&self, key: &Key<T>) -> bool {
        self.values().get(&id(key)).is_some()
    }

    /// Reads or changes the value in place. `f` must not touch the same metadata again.
    pub fn with<T: Default + Send + 'static, R>(&self, key: &Key<T>, f: impl FnOnce(&mut T) -> R) -> R {
        let mut values = self.values();
        match values.get_or_default::<T>(id(key)).downcast_mut::<T>() {
            Some(value) => f(value),
            // The type is part of the key.
            None => f(&mut T::default()),
        }
    }

    /// Drops every value, which ends the tasks that are among them.
    pub fn clear(&self) {
        let values = std::mem::take(&mut *self.values());
        drop(values);
    }
}

fn id<T: 'static>(key: &Key<T>) -> Id {
    (key.instance, key.side, TypeId::of::<T>())
}

fn unbox<T: 'static>(value: Option<Box<dyn Any + Send>>) -> Option<T> {
    value.and_then(|value| value.downcast::<T>().ok()).map(|value| *value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_and_sides_do_not_meet() {
        let metadata = Metadata::new();
        let (first, second) = (Key::<u32>::new(Side::Server), Key::<u32>::new(Side::Server));
        assert_eq!(metadata.insert(&first, 1), None);
        assert_eq!(metadata.insert(&second, 2), None);
        assert_eq!(metadata.insert(&Key::shared(Side::Client), 3_u32), None);
        assert_eq!(metadata.get(&Key::<u32>::shared(Side::Server)), None);
        assert_eq!((metadata.get(&first), metadata.get(&second)), (Some(1), Some(2)));
        metadata.with(&first, |value| *value += 10);
        assert_eq!(metadata.remove(&first), Some(11));
        assert!(!metadata.contains(&first));
    }
}
